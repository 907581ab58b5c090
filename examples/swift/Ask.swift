// Asks a running `nectar serve book.nectar`:   swiftc -parse-as-library Ask.swift && ./Ask book "Who is Filby?"
// The first argument is the file's name without .nectar.

import Foundation
#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

struct Message: Codable {
    let role: String
    let content: String
}

struct Request: Encodable {
    let model: String
    let messages: [Message]
}

struct Reply: Decodable {
    struct Choice: Decodable {
        let message: Message
    }
    let choices: [Choice]
}

func ask(_ question: String, of model: String) async throws -> String {
    var request = URLRequest(url: URL(string: "http://127.0.0.1:8080/v1/chat/completions")!)
    request.httpMethod = "POST"
    request.setValue("application/json", forHTTPHeaderField: "Content-Type")
    request.httpBody = try JSONEncoder().encode(
        Request(model: model, messages: [Message(role: "user", content: question)]))
    let (data, response) = try await URLSession.shared.data(for: request)
    guard (response as? HTTPURLResponse)?.statusCode == 200 else {
        throw NSError(domain: String(decoding: data, as: UTF8.self), code: 1)
    }
    return try JSONDecoder().decode(Reply.self, from: data).choices.first?.message.content ?? ""
}

@main
struct Ask {
    static func main() async throws {
        let words = CommandLine.arguments.dropFirst()
        guard let model = words.first, words.count > 1 else {
            print("usage: Ask NAME QUESTION")
            return
        }
        print(try await ask(words.dropFirst().joined(separator: " "), of: model))
    }
}
