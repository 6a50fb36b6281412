"""What a run is: what is settled before it, what it leaves in its folder."""
