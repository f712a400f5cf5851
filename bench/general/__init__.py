"""The making of the text `general`: packages, what is read in them, how it is cleaned."""
