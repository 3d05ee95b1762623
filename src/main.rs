//! The binary: `temper COMMAND`. See `temper --help`.

fn main() {
    std::process::exit(temper::cli::main());
}
