class LinearAttention:
    pass


def linearize(*a):
    raise NotImplementedError
