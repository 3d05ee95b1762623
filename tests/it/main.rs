//! One integration-test crate: one link, one binary that can be copied to a GPU machine.

mod adapters;
mod architecture;
mod attention;
mod checkpoint;
mod config;
mod data;
mod eval;
mod generate;

mod library;
mod lora_kernels;
mod model_folder;
mod online;
mod ops;
mod peft;
mod plan;
mod policy;
mod preference_config;
mod preference_data;
mod preferences;
mod prim;
mod qlora;
mod quant;
mod quickstart;
mod rendering;
mod report;
mod rewards;
mod rollout;
mod runs;
mod score;
mod sft;
mod shim;
