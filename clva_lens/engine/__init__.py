"""During a pass: what sessions see, and how their edits reach the kernel. Nothing is public."""
