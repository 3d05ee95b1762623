pub mod check;
pub mod cx;
pub mod data;
pub mod device;
pub mod error;
pub mod ops;
pub mod tape;
pub mod tensor;
