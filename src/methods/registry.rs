//! Every method, a line each. Layer 7.
//!
//! Invariant: the training commands, their help, the tables of options in the docs and the tests of
//! options are loops over this list.

use super::MethodEntry;
use super::offline::{cpo, distill, dpo, kto, orpo, prm, reward, sft};
use super::online::{gkd, grpo, online_dpo, ppo, reinforce, rloo};
use crate::error::{Error, Result, nearest};

pub const REGISTRY: &[&MethodEntry] = &[
    &sft::METHOD,
    &sft::PRETRAIN,
    &dpo::METHOD,
    &reward::METHOD,
    &prm::METHOD,
    &kto::METHOD,
    &orpo::METHOD,
    &cpo::METHOD,
    &distill::METHOD,
    &grpo::METHOD,
    &rloo::METHOD,
    &reinforce::METHOD,
    &ppo::METHOD,
    &online_dpo::METHOD,
    &gkd::METHOD,
];

/// The method of a command. Error: there is none.
pub fn find(name: &str) -> Result<&'static MethodEntry> {
    let names = || REGISTRY.iter().map(|e| e.name);
    REGISTRY.iter().copied().find(|e| e.name == name).ok_or_else(|| {
        let hint = nearest(name, names()).map(|n| format!("; did you mean {n}?"));
        let hint = hint
            .unwrap_or_else(|| format!("; there are {}", names().collect::<Vec<_>>().join(", ")));
        Error::Config(format!("no method {name}{hint}"))
    })
}
