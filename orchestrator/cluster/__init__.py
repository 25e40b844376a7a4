"""All that speaks to Ray: placement, worker groups, the rollout and reward pools, weight sync."""
