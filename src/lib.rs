pub mod data;
pub mod error;
pub mod fsio;
pub mod tensor;
