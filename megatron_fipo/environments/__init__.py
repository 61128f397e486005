"""The processes of environments: one answers the turns of many episodes."""
