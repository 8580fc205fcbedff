"""Ways of torch.func through an operator of the signature run(q, k, f, gamma)."""

import torch


def func_grad(run, inputs):
    return torch.func.grad(lambda *x: run(*x).square().sum(), argnums=(0, 1, 2, 3))(*inputs)


def func_vjp(run, inputs):
    s, pull_back, *_ = torch.func.vjp(run, *inputs)
    return s, *pull_back(torch.cos(s))


def func_vmap(run, inputs):
    stacked = [torch.stack([x, x.flip(2), -x], dim=1) for x in inputs]
    return (torch.vmap(run, in_dims=(1, 1, 1, None), out_dims=2)(*stacked[:3], inputs[3]),)


def func_jacrev(run, inputs):
    return torch.func.jacrev(run, argnums=(0, 1, 2, 3))(*inputs)


def func_vmap_of_grad(run, inputs):
    stacked = [torch.stack([x, x.flip(2)]) for x in inputs]
    return torch.vmap(lambda *x: func_grad(run, x))(*stacked)
