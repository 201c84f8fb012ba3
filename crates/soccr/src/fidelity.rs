//! How well something came back.

/// How well a value came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fidelity {
    /// As it was; what the kernel estimates (`rtt`, `rto`, `rcv_ssthresh`), to a twentieth.
    Exact,
    /// Near to what it was, or changed for a reason.
    Approximate,
    /// Not at all.
    Missing,
}
