"""The main job: claim, decode, embed, write."""
