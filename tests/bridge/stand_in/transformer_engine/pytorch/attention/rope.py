"""A kernel that is imported, so that a config may ask for it, and never called here."""

apply_rotary_pos_emb = None
