//! The pointwise non-linearities: what configurations name and kernels compute.

/// A pointwise non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// The tanh approximation, `x/2 * (1 + tanh(sqrt(2/π) * (x + 0.044715 x³)))`: HF's `gelu_new`.
    GeluNew,
    /// `x/2 * (1 + erf(x / sqrt(2)))`.
    Gelu,
    /// `x * sigmoid(x)`.
    Silu,
}
