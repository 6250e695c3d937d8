if not __name__.startswith("meshwright."):
    raise ImportError("import this package as meshwright.plan, never by its bare name")
