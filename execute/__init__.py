if not __name__.startswith("meshwright."):
    raise ImportError("import this package as meshwright.execute, never by its bare name")
