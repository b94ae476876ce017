"""stub"""
Link = Traffic = decode_bound = simulate = None
