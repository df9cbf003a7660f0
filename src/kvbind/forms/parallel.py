def parallel(*a):
    raise NotImplementedError
