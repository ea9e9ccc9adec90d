"""Models as they are published"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from case_registry import (
    CLASSES,
    DIFFERS,
    IMAGES,
    Result,
    Worker,
    case,
    dataset,
    fitted,
)
from keras import layers, ops

SIZE = 8
NOISE = np.random.default_rng(5).normal(size=(len(IMAGES), 4)).astype(np.float32)
FLAT = IMAGES.reshape(len(IMAGES), -1)


class Encoder(keras.Model):
    """Images to vectors."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers_in_order = [layers.Conv2D(8, 3, 2, activation="relu"), layers.Flatten(), layers.Dense(width)]

    def call(self, x: Any) -> Any:
        for layer in self.layers_in_order:
            x = layer(x)
        return x


class Autoencoder(keras.Model):
    """Variational autoencoder; the noise is given, so that it does not depend on the workers."""

    def __init__(self, beta: float = 0.01) -> None:
        super().__init__()
        self.beta = beta
        self.encoder = keras.Sequential([layers.Dense(16, "relu"), layers.Dense(8)])
        self.decoder = keras.Sequential([layers.Dense(16, "relu"), layers.Dense(FLAT.shape[1], "sigmoid")])
        self.total_loss_tracker = keras.metrics.Mean(name="loss")
        self.reconstruction_loss_tracker = keras.metrics.Mean(name="reconstruction_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self) -> list[keras.Metric]:
        return [self.total_loss_tracker, self.reconstruction_loss_tracker, self.kl_loss_tracker]

    def train_step(self, data: Any) -> Any:
        images, noise = data
        with tf.GradientTape() as tape:
            mean, log_var = ops.split(self.encoder(images), 2, axis=-1)
            decoded = self.decoder(mean + ops.exp(0.5 * log_var) * noise)
            reconstruction = ops.mean(
                ops.sum(keras.losses.binary_crossentropy(images[:, None], decoded[:, None]), axis=1)
            )
            kl = ops.mean(ops.sum(-0.5 * (1 + log_var - ops.square(mean) - ops.exp(log_var)), axis=1))
            total = reconstruction + self.beta * kl
        self.optimizer.apply_gradients(
            zip(tape.gradient(total, self.trainable_weights), self.trainable_weights, strict=True)
        )
        self.total_loss_tracker.update_state(total)
        self.reconstruction_loss_tracker.update_state(reconstruction)
        self.kl_loss_tracker.update_state(kl)
        return {metric.name: metric.result() for metric in self.metrics}


@case(workers=(2, 3), slow=False)
def variational_autoencoder(worker: Worker) -> Result:
    """VAE: a `train_step` with means over the batch and three loss trackers"""
    adam = lambda: keras.optimizers.Adam(0.01, epsilon=1e-3)  # noqa: E731
    return fitted(worker.compiled(Autoencoder, optimizer=adam), FLAT, NOISE, batch_size=8)


class Gan(keras.Model):
    """GAN with a discriminator, a generator and an optimizer for each; `compile` is overridden, `call` is not."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = keras.Sequential(
            [
                layers.Input((SIZE, SIZE, 3)),
                layers.Conv2D(8, 3, 2),
                layers.LeakyReLU(0.2),
                layers.Flatten(),
                layers.Dense(1),
            ]
        )
        self.generator = keras.Sequential(
            [layers.Input((4,)), layers.Dense(SIZE * SIZE * 3, "sigmoid"), layers.Reshape((SIZE, SIZE, 3))]
        )
        self.d_loss_tracker = keras.metrics.Mean(name="d_loss")
        self.g_loss_tracker = keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self) -> list[keras.Metric]:
        return [self.d_loss_tracker, self.g_loss_tracker]

    def compile(self, d_optimizer: Any, g_optimizer: Any, loss_fn: Any) -> None:
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    def train_step(self, data: Any) -> Any:
        real, noise = data
        count = ops.shape(real)[0]
        images = ops.concatenate([self.generator(noise), real], axis=0)
        labels = ops.concatenate([ops.ones((count, 1)), ops.zeros((count, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(images))
        grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply_gradients(zip(grads, self.discriminator.trainable_weights, strict=True))
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(ops.zeros((count, 1)), self.discriminator(self.generator(noise)))
        grads = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply_gradients(zip(grads, self.generator.trainable_weights, strict=True))
        self.d_loss_tracker.update_state(d_loss)
        self.g_loss_tracker.update_state(g_loss)
        return {"d_loss": self.d_loss_tracker.result(), "g_loss": self.g_loss_tracker.result()}


@case(slow=False)
def generative_adversarial_network(worker: Worker) -> Result:
    """GAN: two optimizers, no `call`, noise from the data set"""
    with worker.strategy.scope():
        model = Gan()
        sgd = keras.optimizers.SGD
        model.compile(sgd(0.3, momentum=0.5), sgd(1.0), keras.losses.BinaryCrossentropy(from_logits=True))
    worker.enable(model)
    return fitted(model, IMAGES, NOISE, batch_size=8)


class Wgan(Gan):
    """WGAN-GP: the critic is trained twice in a step, with a penalty on its gradient between real and false images."""

    def train_step(self, data: Any) -> Any:
        real, noise = data
        for share in (0.3, 0.8):
            with tf.GradientTape() as tape:
                fake = self.generator(noise)
                between = share * real + (1 - share) * fake
                with tf.GradientTape() as inner:
                    inner.watch(between)
                    judged = self.discriminator(between)
                norm = ops.sqrt(ops.sum(ops.square(inner.gradient(judged, between)), axis=(1, 2, 3)) + 1e-12)
                penalty = ops.mean(ops.square(norm - 1))
                d_loss = ops.mean(self.discriminator(fake)) - ops.mean(self.discriminator(real)) + 10 * penalty
            weights = self.discriminator.trainable_weights
            self.d_optimizer.apply_gradients(zip(tape.gradient(d_loss, weights), weights, strict=True))
        with tf.GradientTape() as tape:
            g_loss = -ops.mean(self.discriminator(self.generator(noise)))
        weights = self.generator.trainable_weights
        self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights, strict=True))
        return {"critic_loss": d_loss, "generator_loss": g_loss}


@case()
def wgan_with_gradient_penalty(worker: Worker) -> Result:
    """WGAN-GP: several updates in a step, a gradient of a gradient, losses without trackers"""
    with worker.strategy.scope():
        model = Wgan()
        model.compile(keras.optimizers.SGD(0.01), keras.optimizers.SGD(0.1), None)
    worker.enable(model)
    return fitted(model, IMAGES, NOISE, batch_size=8)


class Contrastive(keras.Model):
    """SimCLR: every image has to find its other view among all images of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.loss_tracker = keras.metrics.Mean(name="c_loss")

    @property
    def metrics(self) -> list[keras.Metric]:
        return [self.loss_tracker]

    def train_step(self, data: Any) -> Any:
        first, second = data
        with tf.GradientTape() as tape:
            a, b = ops.normalize(self.encoder(first)), ops.normalize(self.encoder(second))
            similarities = ops.matmul(a, ops.transpose(b)) / 0.1
            labels = ops.arange(ops.shape(a)[0])
            loss = ops.mean(ops.sparse_categorical_crossentropy(labels, similarities, from_logits=True))
        weights = self.encoder.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        self.loss_tracker.update_state(loss)
        return {"c_loss": self.loss_tracker.result()}


@case(f"{DIFFERS}log c_loss", slow=False)
def contrastive_learning(worker: Worker) -> Result:
    """SimCLR: a loss over all pairs of the batch"""
    return fitted(worker.compiled(Contrastive), IMAGES, IMAGES[:, ::-1] + 0.1, batch_size=8)


@case()
def siamese_network(worker: Worker) -> Result:
    """Siamese network: a triplet loss, and batches of three tensors"""

    class Siamese(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = keras.Sequential([layers.Input((SIZE, SIZE, 3)), Encoder()])
            self.loss_tracker = keras.metrics.Mean(name="loss")

        def call(self, inputs: Any) -> Any:
            anchor, positive, negative = (self.encoder(x) for x in inputs)
            return ops.sum(ops.square(anchor - positive), -1), ops.sum(ops.square(anchor - negative), -1)

        def triplet_loss(self, data: Any) -> Any:
            near, far = self(data)
            return ops.maximum(near - far + 0.5, 0.0)

        def train_step(self, data: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = ops.mean(self.triplet_loss(data))
            gradients = tape.gradient(loss, self.encoder.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.encoder.trainable_weights, strict=True))
            self.loss_tracker.update_state(loss)
            return {"loss": self.loss_tracker.result()}

        def test_step(self, data: Any) -> Any:
            self.loss_tracker.update_state(self.triplet_loss(data))
            return {"loss": self.loss_tracker.result()}

        @property
        def metrics(self) -> list[keras.Metric]:
            return [self.loss_tracker]

    triplets = dataset(IMAGES, IMAGES[:, :, ::-1], IMAGES[::-1].copy(), size=8)
    model = worker.compiled(Siamese)
    return fitted(model, triplets, validation_data=triplets.take(3))


class Distiller(keras.Model):
    """Knowledge distillation as on keras.io: other keys in the logs than the metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = (
            keras.Sequential([layers.Input((SIZE, SIZE, 3)), Encoder(width), layers.Dense(2)]) for width in (4, 16)
        )

    def compile(self, optimizer: Any, metrics: Any) -> None:
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.distillation_loss_fn = keras.losses.KLDivergence()

    def call(self, x: Any) -> Any:
        return self.student(x)

    def train_step(self, data: Any) -> Any:
        x, y = data
        teacher = self.teacher(x, training=False)
        with tf.GradientTape() as tape:
            student = self.student(x, training=True)
            student_loss = self.student_loss_fn(y, student)
            distillation_loss = 9 * self.distillation_loss_fn(ops.softmax(teacher / 3), ops.softmax(student / 3))
            loss = 0.5 * student_loss + 0.5 * distillation_loss
        weights = self.student.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        scores = ops.softmax(student)[:, 1]
        for metric in self.metrics:
            if metric.name != "loss":
                metric.update_state(y, scores)
        logs = {m.name: m.result() for m in self.metrics if m.name != "loss"}
        return logs | {"student_loss": student_loss, "distillation_loss": distillation_loss}


@case()
def knowledge_distillation(worker: Worker) -> Result:
    """distillation: losses in the logs that are no metrics, beside an AUC"""
    with worker.strategy.scope():
        model = Distiller()
        model.compile(keras.optimizers.SGD(0.5), [keras.metrics.AUC(name="auc")])
    worker.enable(model)
    return fitted(model, IMAGES, CLASSES, batch_size=8)
