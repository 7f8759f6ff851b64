"""Several backward passes at a time through one pass of the depth stream: none sees what another leaves, or spends."""

from concurrent.futures import ThreadPoolExecutor

import torch

from tests.moda.stack import Stack, assert_equal_gradients, loss_of, random_input


def test_a_backward_inside_a_backward_leaves_the_outer_one_exact():
    """A hook that takes gradients through the same graph, as gradient-norm probes do."""
    stack, x = Stack(), random_input()
    inputs = []

    def call(block, *args):
        inputs.append(args[0])
        return block(*args)

    loss = loss_of(stack(x, call=call))
    inner, entered = [], []

    def probe(_):
        if not entered:  # the probe's own backward comes by here too
            entered.append(True)
            inner.append(stack.gradients(loss, retain_graph=True))

    inputs[3].register_hook(probe)
    outer = stack.gradients(loss, retain_graph=True)
    want = stack.gradients(loss_of(stack.definition(x)))
    assert_equal_gradients(outer, want)
    assert_equal_gradients(inner[0], want)


def test_two_threads_go_through_one_retained_graph():
    stack, x = Stack(), random_input(time=33)
    loss = loss_of(stack(x))
    want = stack.gradients(loss_of(stack.definition(x)))
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(lambda _: stack.gradients(loss, retain_graph=True), range(6)):
            assert_equal_gradients(got, want)


def test_a_backward_inside_a_backward_spends_no_slot_that_the_outer_one_reads():
    """Of an early loss: its own graph is gone through once, but the layers above still read its slots."""
    stack, x = Stack(), random_input()
    outputs = []

    def call(block, *args):
        x, handle = block(*args)
        outputs.append(x)
        return x, handle

    def gradients(loss, layers):
        """Of a slot that nobody reads the stream gives zeros, plain autograd none."""
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        got = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, got, strict=True)]

    loss, inner = loss_of(stack(x, call=call)), []
    early, lower, upper = loss_of(outputs[2]), stack.layers[:3], stack.layers[3:]
    outputs[3].register_hook(lambda _: inner.extend(gradients(early, lower)))
    outer = gradients(loss, upper)
    assert_equal_gradients(outer, gradients(loss_of(stack.definition(x)), upper))
    assert_equal_gradients(inner, gradients(loss_of(stack.definition(x, stop=3)), lower))
