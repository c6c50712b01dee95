"""HTML pages in one file each: one shell, one style, escaping, and a content security policy."""
