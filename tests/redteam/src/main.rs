//! The program that runs inside the sandbox. It attacks, says what it felt, and judges nothing.

use std::{
    env,
    io::{self, Write},
    net::{SocketAddr, TcpListener},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use redteam::{
    case::{Case, Part},
    world::World,
};

const USAGE: &str = "\
redteam list                                  what there is to try
redteam run WORLD [CASE...] [--part PART]     tries it; WORLD is a file or its text, PART is attack or twin
redteam listen ADDRESS:PORT                   says a line for every connection, for ten minutes
";
/// How long a listener lives.
const LIFE: Duration = Duration::from_secs(600);
const PAUSE: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match command(&arguments, &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to be told when this fails.
            writeln!(io::stderr(), "redteam: {error}").ok();
            ExitCode::FAILURE
        }
    }
}

fn command(arguments: &[String], out: &mut impl Write) -> Result<(), String> {
    match arguments.split_first() {
        Some((verb, [])) if verb == "list" => list(out).map_err(|error| error.to_string()),
        Some((verb, rest)) if verb == "run" => run(rest, out),
        Some((verb, [address])) if verb == "listen" => {
            let address = address.parse().map_err(|error| format!("{address}: {error}"))?;
            listen(address, out).map_err(|error| error.to_string())
        }
        Some(_) | None => Err(USAGE.to_owned()),
    }
}

fn list(out: &mut impl Write) -> io::Result<()> {
    for case in Case::all() {
        writeln!(
            out,
            "{}\n  tries: {}\n  must:  {}\n  twin:  {}",
            case.id, case.tries, case.must, case.twin
        )?;
    }
    Ok(())
}

fn run(arguments: &[String], out: &mut impl Write) -> Result<(), String> {
    let (world, rest) = arguments.split_first().ok_or(USAGE)?;
    let text = if world.starts_with('{') {
        world.clone()
    } else {
        std::fs::read_to_string(world).map_err(|error| format!("{world}: {error}"))?
    };
    let world = World::parse(&text).map_err(|error| error.to_string())?;
    let (wanted, parts) = match rest.iter().position(|argument| argument == "--part") {
        Some(at) => {
            let part = match rest.get(at + 1).map(String::as_str) {
                Some("attack") => Part::Attack,
                Some("twin") => Part::Twin,
                Some(_) | None => return Err("--part: not attack or twin".to_owned()),
            };
            ([&rest[..at], &rest[at + 2..]].concat(), vec![part])
        }
        None => (rest.to_vec(), vec![Part::Attack, Part::Twin]),
    };
    let cases = if wanted.is_empty() {
        Case::all()
    } else {
        let find = |id: &String| Case::find(id).ok_or_else(|| format!("{id}: no such case"));
        wanted.iter().map(find).collect::<Result<_, _>>()?
    };
    for case in cases {
        for part in &parts {
            let report = case.run(*part, &world);
            let line = serde_json::to_string(&report).map_err(|error| error.to_string())?;
            writeln!(out, "{line}").map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

fn listen(address: SocketAddr, out: &mut impl Write) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    writeln!(out, "listening")?;
    out.flush()?;
    let started = Instant::now();
    while started.elapsed() < LIFE {
        match listener.accept() {
            Ok((_, from)) => {
                writeln!(out, "from {from}")?;
                out.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
