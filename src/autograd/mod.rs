//! Recording and differentiation: the context, the tape and the trait of an op. Layer 3.
//!
//! Invariant: this folder holds the only import cycle of the project: the context runs ops, ops are
//! recorded on the tape, and the tape runs the backward of ops in the context.

mod accumulate;
mod context;
mod op;
mod oracle;
mod tape;

pub use accumulate::{add_into, flat};
pub use context::{
    Beside, Cx, ProductCheck, ProductChoice, ProductPatterns, ProductShape, Recompute,
};
pub use op::{Cost, Fwd, Need, Op, Upstream};
pub use oracle::{F64, Round};
pub use tape::{Grads, Input, Node, ParamGradSets, ParamGrads, Tape};
