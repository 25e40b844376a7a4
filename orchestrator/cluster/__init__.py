"""Everything that uses Ray: placement, worker groups, the rollout and reward pools, weight sync."""
