"""An explorer one can touch: arrays made once, shown in a notebook or as one file for a browser."""
