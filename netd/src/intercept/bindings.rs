//! The bindings of one sandbox, compiled: which secret goes into which request. Holds no value. Pure.

use http::HeaderName;
use sandgate_api::credential::{Binding, Inject};
use sandgate_policy::{BoundHost, DomainName, DomainPattern, RequestHead, RequestPattern};

/// Headers that say how a message is read, or for whom it is: never written by a binding.
const NEVER_INJECTED: [&str; 11] = [
    "host",
    "connection",
    "content-length",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "keep-alive",
    "proxy-connection",
    "expect",
    "accept-encoding",
];

/// Every binding of a sandbox.
#[derive(Debug, Clone, Default)]
pub struct Bindings(Vec<Bound>);

/// One binding.
#[derive(Debug, Clone)]
pub struct Bound {
    /// The secret's name.
    pub secret: String,
    /// The version that the controller wants.
    pub version: u64,
    hosts: Vec<DomainPattern>,
    ports: Vec<u16>,
    requests: RequestPattern,
    /// Where the value goes.
    pub inject: Vec<Inject>,
    /// Whether other credentials are taken out.
    pub strip_client_auth: bool,
    /// What stands in the sandbox in the value's place.
    pub placeholders: Vec<String>,
}

/// A binding cannot be used as it is.
#[derive(Debug, thiserror::Error)]
#[error("the binding of secret {secret}: {problem}")]
pub struct BindingError {
    secret: String,
    problem: String,
}

impl Bindings {
    /// Reads the bindings of a feed.
    ///
    /// # Errors
    /// When one cannot be honoured exactly as it is written.
    pub fn compile(bindings: &[Binding]) -> Result<Self, BindingError> {
        bindings
            .iter()
            .map(|binding| {
                compile(binding).map_err(|problem| BindingError {
                    secret: binding.secret.clone(),
                    problem,
                })
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Bound> {
        self.0.iter()
    }

    /// What the policy must know of them.
    pub fn hosts(&self) -> Vec<BoundHost> {
        let host = |bound: &Bound| BoundHost {
            hosts: bound.hosts.clone(),
            ports: bound.ports.clone(),
        };
        self.0.iter().map(host).collect()
    }

    /// The bindings for a host, whatever is asked of it.
    pub fn for_host(&self, name: &DomainName, port: u16) -> impl Iterator<Item = &Bound> {
        self.0.iter().filter(move |bound| {
            bound.ports.contains(&port) && bound.hosts.iter().any(|pattern| pattern.matches(name))
        })
    }

    /// The bindings that apply to a request.
    pub fn for_request(&self, name: &DomainName, port: u16, request: &RequestHead<'_>) -> Vec<&Bound> {
        self.for_host(name, port)
            .filter(|bound| bound.requests.matches(request))
            .collect()
    }

    /// The version of a secret that is in force.
    pub fn version(&self, secret: &str) -> Option<u64> {
        let mut of_secret = self.0.iter().filter(|bound| bound.secret == secret);
        of_secret.next().map(|bound| bound.version)
    }
}

fn compile(binding: &Binding) -> Result<Bound, String> {
    let hosts = binding.hosts.iter().map(|host| match host.as_str() {
        "*" => Err("`*` is no host to send a secret to".to_owned()),
        host => DomainPattern::parse(host).map_err(|error| format!("host {host}: {error}")),
    });
    let requests =
        RequestPattern::new(&binding.methods, &binding.paths, true).map_err(|error| error.to_string())?;
    for inject in &binding.inject {
        if let Inject::Header { header, .. } = inject {
            let name = HeaderName::from_bytes(header.as_bytes())
                .map_err(|_invalid| format!("{header} is not the name of a header"))?;
            if NEVER_INJECTED.contains(&name.as_str()) {
                return Err(format!("the header {header} cannot be injected"));
            }
        }
    }
    // A short text would be found everywhere.
    if binding.placeholders.iter().any(|text| text.len() < 16) {
        return Err("a placeholder of less than 16 bytes".to_owned());
    }
    Ok(Bound {
        secret: binding.secret.clone(),
        version: binding.version,
        hosts: hosts.collect::<Result<_, _>>()?,
        ports: binding.ports.clone(),
        requests,
        inject: binding.inject.clone(),
        strip_client_auth: binding.strip_client_auth,
        placeholders: binding.placeholders.clone(),
    })
}
