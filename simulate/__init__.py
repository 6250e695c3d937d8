if not __name__.startswith("meshwright."):
    raise ImportError("import this package as meshwright.simulate, never by its bare name")
