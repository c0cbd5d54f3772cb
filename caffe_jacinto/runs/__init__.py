"""A run: the folder that holds it, and everything that drives, watches, keeps and resumes its stages."""
