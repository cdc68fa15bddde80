"""What runs, stores and the rest show to people: what a folder is, a table of many, and the page of a report."""
