//! The environment that answers the turns of a completion. Layer 1.
//!
//! Invariant: without one, a completion has one turn, and no option here has an effect.

use super::{Report, section};

section! {
    /// What answers the turns of a completion.
    pub struct EnvironmentOptions = "environment" {
        /// Ours (TRL: environment_factory and tools of a trainer). Command of a program that
        /// answers the model's turns; docs/environments.md has its protocol. none: a completion has
        /// one turn.
        pub environment: Option<String> = None,
        /// Most answers of the environment in a completion. none: as many as max_completion_length
        /// has room for.
        pub max_tool_calling_iterations: Option<usize> = None,
        /// Ours. Longest silence in seconds of an environment that owes an answer.
        pub environment_timeout: f64 = 60.0,
        /// Ours. How often the environment may be started again in a run.
        pub environment_restarts: usize = 2,
    }
}

impl EnvironmentOptions {
    pub fn is_set(&self) -> bool {
        self.environment.is_some()
    }

    fn rules(&self, report: &mut Report) {
        let seconds = self.environment_timeout;
        report.must(seconds > 0.0, || format!("environment_timeout = {seconds}: must be above 0"));
        match &self.environment {
            Some(command) => {
                report.must(!command.trim().is_empty(), || {
                    "environment is empty: give a command, or leave it out".into()
                });
                // An environment may give rewards.
                report.reward_functions += 1;
            }
            None => {
                let rest =
                    ["max_tool_calling_iterations", "environment_timeout", "environment_restarts"];
                for key in rest {
                    report.idle(key, "environment", "environment is \"none\"");
                }
            }
        }
    }
}
