"""Language models, line by line: the code of the book, one module a chapter.

Modules load when they are first used: `llm_book.tokens` after `import llm_book` just works.
"""
__version__ = "0.1.0"


def __getattr__(name: str):
    import importlib

    if name in __dir__():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    import pkgutil

    return sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name[0] != "_")
