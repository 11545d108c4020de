//! `controller invite`: makes an invitation to register an organisation with, whether the controller runs or not.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, ensure};

use crate::{config::Config, service, store::Store};

/// For whom, and for how long.
#[derive(Debug, clap::Args)]
pub struct Invite {
    /// Who may use it [default: whoever has it]
    #[arg(long, value_name = "ADDRESS")]
    email: Option<String>,
    /// Days until it stops working
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u64).range(1..=30))]
    days: u64,
}

impl Invite {
    /// Prints the token, which works once and is not stored.
    ///
    /// # Errors
    /// When the database is not there or cannot be used.
    pub fn run(&self, config: &Config) -> Result<()> {
        let database = &config.database;
        ensure!(
            database.is_file(),
            "{} is missing: start the controller first",
            database.display()
        );
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting")?;
        let created = runtime.block_on(async {
            let store = Store::open(database)
                .await
                .with_context(|| format!("opening the database {}", database.display()))?;
            let created = service::invite_from_outside(&store, self.email.as_deref(), self.days).await;
            store.close().await;
            created.context("making an invitation")
        })?;
        writeln!(io::stdout().lock(), "{}", created.token).context("writing to standard output")
    }
}
