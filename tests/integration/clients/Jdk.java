import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.file.Path;

/** Sends a file N times by the JDK's own client, which offers HTTP/2; prints the status of each answer. */
public class Jdk {
    static final int REQUESTS_PER_CLIENT = 10;

    public static void main(String[] arguments) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(arguments[0]))
            .POST(HttpRequest.BodyPublishers.ofFile(Path.of(arguments[1])))
            .build();
        HttpClient client = null;
        for (int sent = 0; sent < Integer.parseInt(arguments[2]); sent++) {
            // A new client connects anew, and offers the upgrade again.
            if (sent % REQUESTS_PER_CLIENT == 0) client = HttpClient.newHttpClient();
            try {
                System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
            } catch (Exception error) {
                System.out.println("lost: " + error);
            }
        }
    }
}
