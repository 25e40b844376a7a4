"""The loops, over Protocols alone: offline, online, one optimizer step, evaluation."""
