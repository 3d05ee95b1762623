pub mod data;
pub mod error;
pub mod fsio;
pub mod model;
pub mod tensor;
