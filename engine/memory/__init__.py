"""KV blocks in two tiers: their layout, pools, prefix index, state machine and copies."""
