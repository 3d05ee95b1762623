//! Recording and differentiation: the context passed to everything, the tape, the trait of an op.
//! Layer 3.
//!
//! Invariant: the only circle between files of the project lies in this folder: the context runs
//! ops, ops record on the tape, the tape runs backwards over ops in the context.

mod accumulate;
mod context;
mod op;
mod oracle;
mod tape;

pub use accumulate::{add_into, flat};
pub use context::{Cx, ProductCheck, ProductChoice, ProductPatterns, ProductShape, Recompute};
pub use op::{Cost, Fwd, Need, Op, Upstream};
pub use oracle::{F64, Round};
pub use tape::{Grads, Input, Node, ParamGradSets, ParamGrads, Tape};
