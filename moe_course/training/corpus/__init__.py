"""The shipped text, packed; README.md names its sources and licences."""
