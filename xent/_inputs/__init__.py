"""Every check of an argument, and every layout: what a user passes becomes rows."""
