//! `temper report`: writes the page of a run again. Layer 9.
//!
//! Invariant: a page is a function of the files of the run.

use std::path::PathBuf;

use crate::error::Result;
use crate::observer::output::print_line;
use crate::report;

/// Write report.html for a run, or for a folder of runs
///
/// A finished run has written its page already; a killed run has not.
#[derive(clap::Args)]
pub struct ReportArgs {
    /// a run's --output, a quickstart's, or a folder that holds runs
    dir: PathBuf,
}

pub fn run(args: ReportArgs) -> Result<()> {
    print_line(format_args!("{}", report::again(&args.dir)?.display()))?;
    Ok(())
}
