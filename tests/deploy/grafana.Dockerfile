# A stub of Grafana for machines that cannot pull its image: same user, folder and entrypoint, and an answer to the health
# check. It tests our files, mounts and limits, not Grafana.
FROM python:3.11-slim-bookworm
RUN useradd --uid 472 grafana && mkdir -p /var/lib/grafana /srv/api && chown 472:0 /var/lib/grafana && touch /srv/api/health \
 && printf '#!/bin/sh\nexec curl -fsSo /dev/null "$3"\n' > /usr/local/bin/wget \
 && printf '#!/bin/sh\nexec python -m http.server --directory /srv 3000\n' > /run.sh \
 && chmod 755 /usr/local/bin/wget /run.sh
USER 472
ENTRYPOINT ["/run.sh"]
