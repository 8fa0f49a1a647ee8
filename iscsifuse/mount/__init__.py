"""The file system: the only package that knows pyfuse3, and it imports it only where a mount is really made."""
