NETS: dict = {}
