"""histoseek: a searchable atlas of whole slides, from training to the page a person looks at."""

__version__ = "0.1.0"
