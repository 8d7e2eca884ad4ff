"""Import the files of registered parts, so that they register themselves. The package has none.

A checkpoint whose config names registered parts has another version of this file, which imports them.
"""

PLUGINS: tuple[str, ...] = ()
