"""Aspects that turn calls of ``@task`` methods into dispatches."""
