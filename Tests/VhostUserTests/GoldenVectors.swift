import Foundation

/// One record of `protocol/vectors/vhost-user.txt`.
struct GoldenVector {
  enum Kind: String {
    case frontRequest = "front-request", frontReply = "front-reply", backRequest = "back-request", backReply = "back-reply"
  }

  var name: String
  var kind: Kind
  var descriptorCount: Int
  /// The check that must refuse it; nil for a good message.
  var refusal: String?
  var bytes: [UInt8]

  struct Malformed: Error { var line: String }

  static func load() throws -> [GoldenVector] {
    let file = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
      .deletingLastPathComponent().appendingPathComponent("protocol/vectors/vhost-user.txt")
    var vectors: [GoldenVector] = []
    for line in try String(contentsOf: file, encoding: .utf8).split(separator: "\n") where !line.hasPrefix("#") {
      if line.hasPrefix("[") {
        vectors.append(GoldenVector(name: String(line.dropFirst().dropLast()), kind: .backReply, descriptorCount: -1, bytes: []))
        continue
      }
      guard !vectors.isEmpty else { throw Malformed(line: String(line)) }
      let last = vectors.count - 1
      if line.hasPrefix(" ") {
        let digits = line.filter { $0 != " " }
        guard digits.count % 2 == 0 else { throw Malformed(line: String(line)) }
        var rest = Substring(digits)
        while !rest.isEmpty {
          guard let byte = UInt8(rest.prefix(2), radix: 16) else { throw Malformed(line: String(line)) }
          vectors[last].bytes.append(byte)
          rest = rest.dropFirst(2)
        }
        continue
      }
      let parts = line.split(separator: ":", maxSplits: 1).map { $0.trimmingCharacters(in: .whitespaces) }
      switch parts[0] {
      case "kind":
        guard let kind = Kind(rawValue: parts[1]) else { throw Malformed(line: String(line)) }
        vectors[last].kind = kind
      case "fds":
        guard let count = Int(parts[1]) else { throw Malformed(line: String(line)) }
        vectors[last].descriptorCount = count
      case "refuse": vectors[last].refusal = parts[1]
      case "fields", "bytes": break
      default: throw Malformed(line: String(line))
      }
    }
    return vectors
  }
}
