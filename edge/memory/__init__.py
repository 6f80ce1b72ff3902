"""What every byte of a run is for: computed from shapes before anything is allocated, and measured against it."""
