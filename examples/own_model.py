"""A transformer of one's own on digits: trained dense, then with its policy at 60 % of the energy on Energon."""

import jax
from flax import linen as nn
from sklearn.datasets import load_digits

import codesign
from codesign.hw import accelerator, spec, surrogate


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, images, applied):
        def dense(x, site, size, part):
            kernel = self.param(f"{site}{len(layers)}", nn.linear.default_kernel_init, size)
            return codesign.linear(x, kernel, None, part, site)

        layers, place = [], self.param("position", nn.linear.default_kernel_init, (1, 16, 4))
        x, first = dense(images.reshape(-1, 16, 4) / 8 + place, "embed", (4, 32), applied.ends())
        for layer in (applied.layer(0), applied.layer(1)):
            y, c1 = dense(nn.LayerNorm()(x), "qkv", (32, 96), layer)
            y, c2 = codesign.attention(*y.reshape(-1, 16, 3, 2, 16).transpose(2, 0, 1, 3, 4), layer)
            y, c3 = dense(y.reshape(x.shape), "out", (32, 32), layer)
            h, c4 = dense(nn.LayerNorm()(x + y), "up", (32, 64), layer)
            h, c5 = dense(nn.gelu(h), "down", (64, 32), layer)
            x, layers = x + y + h, [*layers, c1 + c2 + c3 + c4 + c5]
        y, last = dense(x.mean(axis=1), "head", (32, 10), applied.ends())
        return y, codesign.collect(layers, first + last)


def loss_fn(params, applied, rows):
    logits, (workload, _) = model.apply(params, images[rows], applied)
    return -(nn.log_softmax(logits) * nn.one_hot(labels[rows], 10)).sum(-1).mean(), workload


@jax.jit
def energy(workload, smoothness=None):
    return surrogate.cost(workload, machine, smoothness=smoothness).energy_pj("end_to_end").mean()


model, machine = Classifier(), accelerator.accelerator_from_spec(spec.load_preset("energon"))
images, labels = map(jax.numpy.asarray, load_digits(return_X_y=True))
batches = jax.random.randint(jax.random.key(0), (400, 64), 0, 1400)
params = jax.jit(model.init)(jax.random.key(1), images, codesign.AppliedPolicy())
params, _ = codesign.fit(loss_fn, params, codesign.AppliedPolicy(), batches, weight_rate=5e-3)
_, (dense, ranges) = model.apply(params, images[:1400], codesign.AppliedPolicy(calibrating=True))
start = codesign.policy_for(ranges, 2, codesign.mechanism_by_name("energon"))
params, applied = codesign.fit(loss_fn, params, start, batches, energy, 0.6 * energy(dense))
logits, (workload, _) = jax.jit(model.apply)(params, images[1400:], applied)
print(f"accuracy {(logits.argmax(-1) == labels[1400:]).mean():.3f} with decisions as deployed")
print(f"energy {energy(workload) / energy(dense):.3f} of dense (straight-through, not integers)")
