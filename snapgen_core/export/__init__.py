"""Export to phones, and proof on any machine that what was exported computes what was trained."""
