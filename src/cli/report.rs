//! `temper report`: a run's page again. Layer 9.
//!
//! Invariant: a page is a function of the files of the run.

use std::path::PathBuf;

use crate::error::Result;
use crate::observer::output::print_line;
use crate::report;

/// Write report.html of a run's folder again (a run that is killed writes none), or of a folder of
/// runs
#[derive(clap::Args)]
pub struct ReportArgs {
    /// a run's --output, a quickstart's, or a folder that holds runs
    dir: PathBuf,
}

pub fn run(args: ReportArgs) -> Result<()> {
    print_line(format_args!("{}", report::again(&args.dir)?.display()))?;
    Ok(())
}
