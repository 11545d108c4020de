//! Bindings of well-known secrets, by name. This table is the only place in the system that knows services by
//! name; whoever wants something else says so in the request.

use sandgate_api::{
    credential::{Inject, PlaceholderPlace, VALUE_MARK},
    rest::EgressBinding,
};

/// How a service wants its key.
#[derive(Debug, Clone, Copy)]
enum Style {
    Bearer,
    /// The user name.
    Basic(&'static str),
    /// The header's name.
    Header(&'static str),
    /// Wherever the client puts it.
    Anywhere,
}

/// Secret's name, hosts, style. Several lines of one name are several bindings.
const PRESETS: [(&str, &[&str], Style); 37] = [
    (
        "ANTHROPIC_API_KEY",
        &["api.anthropic.com"],
        Style::Header("x-api-key"),
    ),
    ("ANTHROPIC_AUTH_TOKEN", &["api.anthropic.com"], Style::Bearer),
    ("CLAUDE_CODE_OAUTH_TOKEN", &["api.anthropic.com"], Style::Bearer),
    ("OPENAI_API_KEY", &["api.openai.com"], Style::Bearer),
    ("OPENROUTER_API_KEY", &["openrouter.ai"], Style::Bearer),
    (
        "GEMINI_API_KEY",
        &["generativelanguage.googleapis.com"],
        Style::Header("x-goog-api-key"),
    ),
    (
        "GOOGLE_API_KEY",
        &["generativelanguage.googleapis.com"],
        Style::Header("x-goog-api-key"),
    ),
    ("MISTRAL_API_KEY", &["api.mistral.ai"], Style::Bearer),
    ("GROQ_API_KEY", &["api.groq.com"], Style::Bearer),
    ("DEEPSEEK_API_KEY", &["api.deepseek.com"], Style::Bearer),
    ("XAI_API_KEY", &["api.x.ai"], Style::Bearer),
    (
        "TOGETHER_API_KEY",
        &["api.together.xyz", "api.together.ai"],
        Style::Bearer,
    ),
    (
        "COHERE_API_KEY",
        &["api.cohere.com", "api.cohere.ai"],
        Style::Bearer,
    ),
    ("PERPLEXITY_API_KEY", &["api.perplexity.ai"], Style::Bearer),
    ("REPLICATE_API_TOKEN", &["api.replicate.com"], Style::Bearer),
    ("HF_TOKEN", &["huggingface.co"], Style::Bearer),
    ("HUGGING_FACE_HUB_TOKEN", &["huggingface.co"], Style::Bearer),
    (
        "GITHUB_TOKEN",
        &["api.github.com", "uploads.github.com"],
        Style::Bearer,
    ),
    ("GITHUB_TOKEN", &["github.com"], Style::Basic("x-access-token")),
    (
        "GH_TOKEN",
        &["api.github.com", "uploads.github.com"],
        Style::Bearer,
    ),
    ("GH_TOKEN", &["github.com"], Style::Basic("x-access-token")),
    ("GITLAB_TOKEN", &["gitlab.com"], Style::Anywhere),
    ("STRIPE_API_KEY", &["api.stripe.com"], Style::Bearer),
    ("STRIPE_SECRET_KEY", &["api.stripe.com"], Style::Bearer),
    ("SLACK_BOT_TOKEN", &["slack.com"], Style::Bearer),
    ("SLACK_TOKEN", &["slack.com"], Style::Bearer),
    ("SENTRY_AUTH_TOKEN", &["sentry.io"], Style::Bearer),
    ("NOTION_API_KEY", &["api.notion.com"], Style::Bearer),
    (
        "LINEAR_API_KEY",
        &["api.linear.app"],
        Style::Header("authorization"),
    ),
    ("SENDGRID_API_KEY", &["api.sendgrid.com"], Style::Bearer),
    ("RESEND_API_KEY", &["api.resend.com"], Style::Bearer),
    ("VERCEL_TOKEN", &["api.vercel.com"], Style::Bearer),
    ("CLOUDFLARE_API_TOKEN", &["api.cloudflare.com"], Style::Bearer),
    (
        "DIGITALOCEAN_ACCESS_TOKEN",
        &["api.digitalocean.com"],
        Style::Bearer,
    ),
    ("TAVILY_API_KEY", &["api.tavily.com"], Style::Bearer),
    (
        "ELEVENLABS_API_KEY",
        &["api.elevenlabs.io"],
        Style::Header("xi-api-key"),
    ),
    (
        "BRAVE_API_KEY",
        &["api.search.brave.com"],
        Style::Header("x-subscription-token"),
    ),
];

/// The bindings of a well-known name.
pub fn bindings(name: &str) -> Option<Vec<EgressBinding>> {
    let bindings: Vec<EgressBinding> = PRESETS
        .into_iter()
        .filter(|(known, _, _)| *known == name)
        .map(|(_, hosts, style)| EgressBinding {
            hosts: hosts.iter().map(|&host| host.to_owned()).collect(),
            ports: vec![443],
            methods: Vec::new(),
            paths: Vec::new(),
            inject: vec![inject(style)],
            strip_client_auth: true,
        })
        .collect();
    (!bindings.is_empty()).then_some(bindings)
}

fn inject(style: Style) -> Inject {
    match style {
        Style::Bearer => Inject::Bearer,
        Style::Basic(username) => Inject::Basic {
            username: username.to_owned(),
        },
        Style::Header(header) => Inject::Header {
            header: header.to_owned(),
            format: VALUE_MARK.to_owned(),
        },
        Style::Anywhere => Inject::Placeholder {
            places: vec![PlaceholderPlace::Header, PlaceholderPlace::Query],
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binding;

    #[test]
    fn every_preset_is_a_binding_that_a_user_could_have_written() {
        for (name, _, _) in PRESETS {
            let bindings = bindings(name).expect("a preset");
            for one in &bindings {
                binding::check(one, "egress").unwrap_or_else(|error| panic!("{name}: {error:?}"));
            }
        }
        assert_eq!(bindings("MY_OWN_KEY"), None);
        assert_eq!(bindings("anthropic_api_key"), None);
    }

    #[test]
    fn git_hosts_want_another_form_than_their_api() {
        let github = bindings("GITHUB_TOKEN").expect("a preset");
        assert_eq!(github.len(), 2);
        assert_eq!(github[0].inject, [Inject::Bearer]);
        assert_eq!(
            github[1].inject,
            [Inject::Basic {
                username: "x-access-token".to_owned()
            }]
        );
    }
}
